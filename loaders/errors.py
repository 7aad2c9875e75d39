"""The one error a user sees when data, and not the program, is at fault."""


class DataError(Exception):
    """Bad data or a bad path; the message is one line that names the thing and what to do."""
