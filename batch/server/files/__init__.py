"""Files that the endpoint stores and serves."""
