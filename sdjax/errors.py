"""The one exception that means: the user's input is wrong, and here is how."""


class SdjaxError(ValueError):
    """Bad input, said in one sentence: what, its value, and what would be right."""
