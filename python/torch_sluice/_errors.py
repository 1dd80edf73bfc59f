"""Errors of the operator library, the same under every torch."""


def as_value_error(error: RuntimeError) -> Exception:
    """``error`` as the ValueError that it means, or as it is.

    From torch 2.15 on, a std::invalid_argument of the operator library arrives as a RuntimeError.
    """
    if type(error) is RuntimeError and ", expected " in str(error):
        return ValueError(str(error))
    return error
