"""What runs the model: transformers in this process, and whatever else can answer prompts."""
