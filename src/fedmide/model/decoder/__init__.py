"""The Llama-shaped decoder, written by hand for speed."""
