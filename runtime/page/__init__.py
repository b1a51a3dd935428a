"""Reports as HTML pages that need nothing else: one frame and style, and the charts in them."""
