"""Bytes on disk → Views: conversion, decode-once loaders, the view stage. Imports nothing of fast_essl."""
