"""The weight loader: from a source (file, memory, web, hub, object store) to tensors of a backend's factory."""
