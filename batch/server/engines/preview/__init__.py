"""The preview engine: filters that show quickly, without a model, roughly what a batch will look like.

It adds no content to the images. Its name, /health and the metadata of each image say so.
"""
