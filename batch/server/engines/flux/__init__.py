"""The flux engine: FLUX.1 [dev] image-to-image on one's own devices, a worker process each.

Torch and diffusers are imported inside those processes only. In the server stay `options`, `folder`, `hub` and
`engine`; in the workers run `loading`, `tuning`, `safety`, `trouble` and `renderer`.
"""
