"""The Llama-shaped decoder, written out by hand for speed."""
