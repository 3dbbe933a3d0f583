"""Whether journal, results, images and bills agree."""
