"""herd's library: recipe, model, parallel layouts, data, training, Hugging Face in and out."""
