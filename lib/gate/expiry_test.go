package gate

import (
	"testing"
	"time"

	"github.com/bottle-tools/bottle/lib/ca"
	"github.com/bottle-tools/bottle/lib/plan"
)

// An authority that has ended is said so before the tunnel stands; nobody is
// given a certificate that no guest takes, and hosts that are not inspected go on.
func TestExpiredAuthority(t *testing.T) {
	o := startOrigin(t, true, echo, "api.test", "plain.test")
	for _, c := range []struct {
		begin time.Duration
		code  string
	}{{-3 * time.Hour, "ca_expired"}, {30 * 24 * time.Hour, "ca_not_yet_valid"}} {
		g := start(t, []plan.Rule{inspect(pin(allowHost("api.test", "tls", o.port), "127.0.0.1")), pin(allowHost("plain.test", "tls", o.port), "127.0.0.1")}, nil,
			func(cfg *Config) {
				var err error
				if cfg.CA, err = ca.New("t-01234567", []string{"api.test"}, time.Now().Add(c.begin), time.Hour); err != nil {
					t.Fatal(err)
				}
			})
		status, f, _ := g.connect(hostPort("api.test", o.port))
		if status != 403 || f.Error.Code != c.code || f.Error.Hint == "" || f.Error.Reason == "" {
			t.Errorf("%d %+v", status, f)
		}
		if status, _, _ := g.connect(hostPort("plain.test", o.port)); status != 200 {
			t.Errorf("a host that is not inspected: %d", status)
		}
	}
}
