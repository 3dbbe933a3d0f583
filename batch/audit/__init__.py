"""The audit: whether journal, results, images and bills agree."""
