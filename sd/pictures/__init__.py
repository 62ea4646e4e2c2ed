"""Picture files with their generation parameters, contact sheets and line plots."""

from sd.pictures.image_io import ImageError, load_image, read_parameters, save_image
from sd.pictures.sheets import contact_sheet, line_plot

__all__ = ["ImageError", "contact_sheet", "line_plot", "load_image", "read_parameters", "save_image"]
