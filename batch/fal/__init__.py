"""The API: the endpoint's schema, the wire protocol in both roles, and the client edge."""
