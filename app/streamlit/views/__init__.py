"""The page's views; each has one function, `render(ctx)`."""
