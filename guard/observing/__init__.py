"""What the guard does, watched from outside: its metrics read and kept, and its counts compared."""
