"""The endpoint's HTTP API: routes, authentication, pages, the platform API."""
