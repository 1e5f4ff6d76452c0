from .files import load_probes as load_probes, save_probes as save_probes
from .metrics import pearson as pearson, r2 as r2, rmse as rmse, spearman as spearman
from .moments import alpha_path as alpha_path, gather as gather
from .pca_ridge import PCARidge as PCARidge, cross_validate as cross_validate
