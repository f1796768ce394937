"""Standard files as values: one array is one ``.npy`` file, one record is one ``.safetensors`` file."""
