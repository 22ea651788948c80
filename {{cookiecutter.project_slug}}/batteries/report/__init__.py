"""Layer 4: the HTML report: run histories, sections, plots and page layout."""
