"""A guard in front of a server whose model cannot be hooked: features come as outputs, and go no further."""
