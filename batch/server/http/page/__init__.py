"""The page that a person sees at `/`: what runs here, what it does, and a form to try it."""
