"""The web page at `/`: the engine, live numbers, recent requests, and a form to send one."""
