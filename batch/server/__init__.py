"""The self-hosted endpoint: fal's protocol on your own machine."""
