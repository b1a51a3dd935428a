"""What a model is: configuration, weights as data, rotary tables, memory plan."""
