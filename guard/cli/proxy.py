def proxy() -> None:
    """x"""
