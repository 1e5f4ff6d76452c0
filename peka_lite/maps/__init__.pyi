from .local_pcc import local_pcc as local_pcc, pcc_map as pcc_map
from .style import use_style as use_style
from .tissue import expression_map as expression_map, predicted_map as predicted_map
from .viewer import slide_viewer as slide_viewer
