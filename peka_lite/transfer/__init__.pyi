from .costs import Cost as Cost, student_cost as student_cost
from .fit import fit as fit
from .losses import transfer_loss as transfer_loss
from .model import TransferModel as TransferModel
