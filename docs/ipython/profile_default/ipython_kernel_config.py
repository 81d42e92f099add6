"""Figures of code cells are drawn at twice the size that they are shown in, for sharp screens."""

c = get_config()  # noqa: F821
c.InlineBackend.figure_formats = {"retina"}
c.InlineBackend.print_figure_kwargs = {"bbox_inches": None}
c.HistoryManager.enabled = False
c.IPKernelApp.log_level = "ERROR"
