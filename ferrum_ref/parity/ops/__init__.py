"""The operations that are judged: for each one its cases, its inputs, how a backend is called, and what is expected."""
