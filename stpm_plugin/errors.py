"""The one exception that a user's input can cause."""


class STPMError(ValueError):
    """Something in the configuration, the weights or the data is wrong; the message says what, where and the remedy."""
