"""The places that weights come from, one file each."""
