"""The endpoint's HTTP face: routes, authentication, pages, the platform API."""
