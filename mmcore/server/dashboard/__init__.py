"""The dashboard: a page that an instance serves of itself, and the JSON that the page shows.

``events`` and ``recent`` note what happens from the start on; ``listing`` and ``dashboard`` are imported when somebody
looks.
"""
