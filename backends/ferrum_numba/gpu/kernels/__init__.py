"""The kernels. Each module makes Kernels for given storage types; `catalogue` lists all that are ever launched."""
