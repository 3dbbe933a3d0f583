"""Requests of the endpoint to other servers, checked against server-side request forgery."""
