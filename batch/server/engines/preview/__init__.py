"""The preview engine: filters that show at once, and without a model, what a batch will look like.

It adds no content, and says so everywhere: in its name, in /health, in each image's metadata.
"""
