"""lga-plan: the compiler from a PyTorch model to a static layered-gradient-accumulation plan."""
