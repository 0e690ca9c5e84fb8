"""The page and its API: all that needs gradio or spaces."""
