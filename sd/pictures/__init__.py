"""Picture files with their generation parameters, contact sheets and line plots."""

from sd.pictures.image_io import ImageError, load_image, read_parameters, save_image
from sd.pictures.parameters import format_parameters, parse_parameters
from sd.pictures.sheets import contact_sheet, line_plot

__all__ = ["ImageError", "contact_sheet", "format_parameters", "line_plot", "load_image", "parse_parameters",
           "read_parameters", "save_image"]
