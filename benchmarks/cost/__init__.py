"""What a step costs: time, compilation, memory, growth with size."""
