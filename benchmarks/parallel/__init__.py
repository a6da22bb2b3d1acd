"""Plans for models that several GPUs share: exchanges, memory and a simulated scaling."""
