// Stands in for libopencv-dev's header of this name, which includes all of OpenCV: FFCV uses these two parts.
#pragma once
#include <opencv2/core.hpp>
#include <opencv2/imgproc.hpp>
