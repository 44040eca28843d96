"""One model over several ranks: sharded by heads and features (tensor parallel), by layers (pipeline), or both."""
