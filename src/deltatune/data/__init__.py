"""Tasks, their files, and how they are scored; knows nothing of models."""

from deltatune.data.embedded import embedded_tasks as embedded_tasks
from deltatune.data.intervals import Interval as Interval
from deltatune.data.intervals import bootstrap_interval as bootstrap_interval
from deltatune.data.intervals import interval as interval
from deltatune.data.intervals import paired_interval as paired_interval
from deltatune.data.load import load_task as load_task
from deltatune.data.load import task as task
from deltatune.data.metrics import METRICS as METRICS
from deltatune.data.metrics import check_metric as check_metric
from deltatune.data.metrics import constant as constant
from deltatune.data.metrics import default_metric as default_metric
from deltatune.data.metrics import majority as majority
from deltatune.data.metrics import references as references
from deltatune.data.metrics import score as score
from deltatune.data.task import FIELDS as FIELDS
from deltatune.data.task import INPUTS as INPUTS
from deltatune.data.task import SPLITS as SPLITS
from deltatune.data.task import Kind as Kind
from deltatune.data.task import Row as Row
from deltatune.data.task import Task as Task
