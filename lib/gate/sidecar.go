package gate

import (
	"context"
	"crypto/subtle"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/bottle-tools/bottle/lib/audit"
	"github.com/bottle-tools/bottle/lib/fault"
)

// Sidecar is a proxy that the requests of inspected hosts pass on their way, and
// that may read and change them. The gate gives it what the guest asked and was
// allowed, and takes it back on Back as if it came from a guest: host, path and
// address are decided anew, and only then do secrets go in. Answers have lost
// them before the sidecar sees one.
type Sidecar struct {
	Name string // for the log: mitmdump
	Addr string // host:port of its proxy
	// Auth is what the gate says at Addr, BackAuth what the sidecar says at Back:
	// user:password. Both are ports that other users of the host can reach.
	Auth, BackAuth string
	CA             []byte // PEM; what it shows at Addr is signed by this and nothing else
	Back           net.Listener
}

// known refuses a CONNECT on Back that is not the sidecar's.
func (s *Sidecar) known(r *http.Request) *Refusal {
	word := "Basic " + base64.StdEncoding.EncodeToString([]byte(s.BackAuth))
	if subtle.ConstantTimeCompare([]byte(r.Header.Get("Proxy-Authorization")), []byte(word)) == 1 {
		return nil
	}
	f := refused("not_the_sidecar", "", 0, "this port of the gate is for "+s.Name+" alone", "")
	f.Status = http.StatusProxyAuthRequired
	return f
}

// denyStranger notes that somebody who has not said to be the sidecar was refused
// on its way back. Other users of the host get there, and must not push the
// bottle's decisions out of the log: of each kind there is a line in ten minutes,
// which holds nothing that they chose.
func (g *Gate) denyStranger(f *Refusal) {
	if ok, _ := g.strangers.admit(f.Code, time.Now()); !ok {
		g.stats.denied.Add(1)
		return
	}
	e := g.newEvent(audit.KindConnect, "", 0)
	e.Sender = g.cfg.Sidecar.Name
	g.deny(f, e)
}

// sidecarTransport sends requests to the sidecar. It trusts only its authority,
// and goes no other way when it is not there.
func (g *Gate) sidecarTransport() (*http.Transport, error) {
	s := g.cfg.Sidecar
	roots := x509.NewCertPool()
	user, password, ok := strings.Cut(s.Auth, ":")
	if !roots.AppendCertsFromPEM(s.CA) || !ok || s.BackAuth == "" || s.Back == nil {
		return nil, fault.New(fault.Bug, "bad_sidecar", "the gate's sidecar has no certificate, no password or no way back")
	}
	tr := g.direct.Clone()
	tr.TLSClientConfig = &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12, NextProtos: []string{"http/1.1"}}
	tr.Proxy = http.ProxyURL(&url.URL{Scheme: "http", Host: s.Addr, User: url.UserPassword(user, password)})
	tr.DialContext = func(ctx context.Context, network, address string) (net.Conn, error) {
		c, err := g.dialProxy(ctx, network, address)
		if err != nil {
			return nil, s.down()
		}
		return c, nil
	}
	tr.OnProxyConnectResponse = func(_ context.Context, _ *url.URL, _ *http.Request, resp *http.Response) error {
		if resp.StatusCode != http.StatusOK {
			return s.down()
		}
		return nil
	}
	return tr, nil
}

// down is no decision: the sidecar is restarted, and there is no other way.
func (s *Sidecar) down() *Refusal {
	return &Refusal{Status: http.StatusServiceUnavailable, Code: "sidecar_down", Retry: 1,
		Reason: s.Name + " is not running, and meanwhile nothing goes to inspected hosts", Hint: "try again in some seconds"}
}
