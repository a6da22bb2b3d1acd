"""What runs on the device: compiled steps, sampling, copies of blocks, the size of the pool."""
