from ._tokens import tokenize as tokenize
from .load import embed_cohort as embed_cohort, load_teacher as load_teacher
from .pca import PCATeacher as PCATeacher
from .pseudolabels import PseudoLabeler as PseudoLabeler
from .scfoundation import ScFoundation as ScFoundation
