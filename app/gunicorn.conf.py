"""Read by gunicorn from its working directory. Its command line wins."""

# Without the query and the referrer: what somebody searched for may be an address.
access_log_format = '%(h)s "%(m)s %(U)s" %(s)s %(B)s %(M)sms request=%({x-request-id}o)s'
