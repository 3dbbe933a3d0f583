"""The flux engine: FLUX.1 [dev] image-to-image on local devices, with one worker process per device.

Only the workers import torch and diffusers. `options`, `folder`, `hub` and `engine` run in the server process;
`loading`, `tuning`, `safety`, `errors`, `restyle` and `renderer` run in the workers.
"""
