"""The real engine on a simulated device: what is decided is real, times are computed."""
