"""What is done to a model: recipes, and the protocols of their parts."""
